from halo.serve import packb, unpackb  # noqa: F401
