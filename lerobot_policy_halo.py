"""LeRobot's entrance to HALO.

LeRobot imports this module because the distribution has the same name; the imports register
`--policy.type=halo`, HALO's processor step, its environments and the robot
of the chapter on your own robot, so that its commands need no further flag.
"""

import halo.deploy.twoarms  # noqa: F401
import halo.policy.configuration_halo  # noqa: F401
import halo.policy.processor_halo  # noqa: F401
import halo.sim.flash_place  # noqa: F401
import halo.sim.tool_frame  # noqa: F401
