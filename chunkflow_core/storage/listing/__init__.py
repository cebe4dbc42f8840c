"""What storage says of a layer's storage chunks, asked by as few requests as can be.

Storage is a disk, S3, GCS or a web server.
"""
