"In the place of LIBERO's simulators."

from .env_wrapper import ControlEnv


class OffScreenRenderEnv(ControlEnv):
    "Draws where the thing is."
