"""Bytes and layers at addresses: on disks, in object stores, over HTTP.

Everything here takes plain values, not a spec.
"""
