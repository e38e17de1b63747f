"""LeRobot's entrance to HALO.

LeRobot imports this module because the distribution has the same name; the imports register
`--policy.type=halo`, HALO's processor step, its environments and the robot
of the chapter on your own robot, so that its commands need no further flag.
"""

import halo.configuration_halo  # noqa: F401
import halo.envs  # noqa: F401
import halo.processor_halo  # noqa: F401
import halo.twoarms  # noqa: F401
