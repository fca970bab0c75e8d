"""Readers, one per kind of data set. Each enumerates units of work and turns a unit into samples or named defects.

The interface is ``data_prep.prepare.Source``; ``conf/data_prep/source/NAME.yaml`` names the reader (``kind``) and its
settings.
"""
