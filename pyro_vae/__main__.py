import sys

from pyro_vae.cli.app import main

if not sys.flags.safe_path:
    del sys.path[0]  # the working folder: a file there must not shadow a library

main()
