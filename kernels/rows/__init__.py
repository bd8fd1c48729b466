"""Rows spread over the ranks of a process group: who has how many, gathered and reduced; shared by the losses."""
