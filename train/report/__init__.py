"""One self-contained HTML page about one or several runs: results with errors, curves, mined pairs, machine.

runs.py reads what training and evaluation left in the run folders, compare.py makes tables and differences of them,
charts.py, mining_section.py and machine.py make the other parts, page.py joins them.
"""
