"""What trains, compares and serves the networks of the lessons, with all that a long run needs.

`models/train.py` is the command line. The lessons beside this package need none of it but `data`.
"""
