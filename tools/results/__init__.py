"""The results of the project: what produces them, and the page they are read on.

registry.py   every result: what of the paper it stands beside, its commands, its files
runner.py     runs what is missing
page.py       docs/results.md from the files under benchmarks/results; surfaces.py, robustness.py
              more.py and tables.py have its parts, published.py what others have published
"""
