"""What our trainer costs over a bare loop, and against open_clip's trainer, on the same model, batches or tars, and ranks.

__main__.py has the flags, starts the ranks and writes the report; contenders.py is what each rank runs.
"""
