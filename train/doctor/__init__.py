"""What is wrong with a machine or a run's settings before it starts: one line for each check, with the remedy.

machine.py looks at packages, programs, limits and the environment, shared_memory.py at /dev/shm, training.py at the settings of a run,
round_trip.py lets ranks talk to one another. Each check is a function that returns findings and changes nothing.
"""
