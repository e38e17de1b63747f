"""In the place of openpi-client, which wants another NumPy: the same names over our own
client.
"""
