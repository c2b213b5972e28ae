"""Peers of SIFT, one file each: its arm as ``ARM``, its steps, and what they compute, each piece from its paper.

The name of the file is the name of the arm. Files import torch within functions, as `earlysift.compare.arm` says why.
Letters in shapes: R samples, n labelled predictions of all samples together (positions of a token task, samples of a
classification), V classes.
"""
