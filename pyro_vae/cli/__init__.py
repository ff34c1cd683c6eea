"""The command line: ``pyro-vae``."""
