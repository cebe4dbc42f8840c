"""Block-wise convnet inference and blending of 3D volumes, exact to the bit.

Knows nothing of Airflow or Kubernetes. See ``docs/glossary.md`` for the words used throughout.
"""
