"In the place of LIBERO-PRO."
