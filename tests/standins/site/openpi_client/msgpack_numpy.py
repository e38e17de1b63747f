from halo.deploy.serve import packb, unpackb  # noqa: F401
