"""`python -m train.pocket.data`: fetch, render and write the pocket data (train/pocket/build.py says what comes out)."""

if __name__ == "__main__":
    # Imported here, since every spawned rendering process imports this file again and needs nothing of it.
    from mining.command_line import run
    from train.pocket.build import main

    run(main)
