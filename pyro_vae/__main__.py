from pyro_vae.cli import main

main()
