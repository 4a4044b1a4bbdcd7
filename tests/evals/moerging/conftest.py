from tests.experts.library.conftest import home

__all__ = ["home"]
