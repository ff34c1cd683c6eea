import sys

from pyro_vae.cli.app import main

if not sys.flags.safe_path:
    del sys.path[0]  # the working folder, whose files are not to be imported in the place of libraries

main()
