"""How the chosen experts' answers become one."""
