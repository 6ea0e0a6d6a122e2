"""How the `gptdist` command reads its command line."""
