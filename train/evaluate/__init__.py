"""Measure a checkpoint: zero-shot classification, retrieval and linear probe on any labelled or captioned picture set.

A suite (suite.py) names the data and the tasks. The pictures are read and encoded once (data.py, features.py), each
task turns the features into one number per picture, caption or class (zeroshot.py, retrieval.py, linear_probe.py over
ranking.py), and results.py reduces those to values with standard errors, writes them and prints them.
"""
