"""Hubble's public API as this project writes it down, and the Python that protoc makes of it.

`*_pb2.py` and `*_pb2.pyi` are committed: an installation, an image and a type check need no
compiler, and a change of the contract shows as a change of files. They are made by `make protos`,
never by hand; a test makes them anew and compares.
"""
