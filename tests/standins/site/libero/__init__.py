"In the place of LIBERO."
