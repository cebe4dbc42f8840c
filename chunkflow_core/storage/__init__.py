"""Bytes and layers at addresses: on disks, in object stores, over HTTP. Takes plain values, not a spec."""
