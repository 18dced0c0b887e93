"""Preference training: DPO, ORPO, KTO and SimPO on the trainer of supervised training.

A preference loss takes the place of the supervised loss in a training step; everything else of a run stays the same.
"""
