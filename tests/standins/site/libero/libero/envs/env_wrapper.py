"""In the place of LIBERO's simulator: a carton, a basket and a bottle of boxes; a hand that
goes half of what is asked for and carries what it has closed on.
"""

from types import SimpleNamespace

import numpy as np

DOWN = np.diag([1.0, -1, -1])
BODIES = 'world hand milk basket bottle'.split()
# body, offset of the centre from the body, half sizes: m
BOXES = [
    (0, (0, 0, -0.01), (1, 1, 0.01)),
    (2, (0, 0, 0), (0.026, 0.026, 0.065)),
    (3, (0, 0, 0.01), (0.07, 0.07, 0.01)),
    *[(3, (0, s * 0.075, 0.072), (0.07, 0.007, 0.072)) for s in (-1, 1)],
    *[(3, (s * 0.069, 0, 0.072), (0.007, 0.07, 0.072)) for s in (-1, 1)],
    (4, (0, 0, 0.07), (0.02, 0.02, 0.07)),
]


class ControlEnv:
    def __init__(self, bddl_file_name, camera_heights=1, camera_widths=1, **options):
        self.shape, self.env = (camera_heights, camera_widths, 3), self
        controller = SimpleNamespace(ee_ori_mat=DOWN)
        model = SimpleNamespace(eef_name='hand')
        self.robots = [
            SimpleNamespace(controller=controller, robot_model=model, eef_site_id=0)
        ]
        body = lambda name: SimpleNamespace(root_body=name)
        self.objects_dict = {n: body(n) for n in BODIES[2:]}
        self.object_sites_dict = dict(inside=SimpleNamespace(parent_name='basket'))
        self.parsed_problem = dict(goal_state=[['in', 'milk', 'inside']])
        self.options = options

    def set_xml_processor(self, processor):
        self.processor = processor

    def seed(self, seed):
        self.rng = np.random.default_rng(seed)

    def reset(self):
        return self.set_init_state(self.rng.uniform(-0.03, 0.03, 2))

    def set_init_state(self, state):
        self.hand, self.yaw, self.held = np.array([-0.15, 0, 0.26]), 0.0, False
        places = [0, 0, 0], [-0.15, 0, 0.26], [0.05, -0.1, 0.065], [0, 0.26, 0], [0.1, 0, 0]
        self.places = np.array(places, float)
        self.places[2, :2] += state
        self.sim = SimpleNamespace(model=self.model(), data=None)
        return self.look()

    def model(self):
        half = np.array([h for _, _, h in BOXES], float)
        return SimpleNamespace(
            body_name2id=BODIES.index,
            body_parentid=np.zeros(len(BODIES), int),
            geom_contype=np.ones(len(BOXES), int),
            geom_bodyid=np.array([b for b, _, _ in BOXES]),
            geom_aabb=np.concatenate([np.zeros_like(half), half], axis=1),
        )

    def look(self):
        c, s = np.cos(self.yaw), np.sin(self.yaw)
        axes = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ DOWN
        self.sim.data = SimpleNamespace(
            geom_xpos=np.array([self.places[b] + offset for b, offset, _ in BOXES]),
            geom_xmat=np.tile(np.eye(3).ravel(), (len(BOXES), 1)),
            site_xpos=self.hand[None],
            body_xmat=np.tile(axes.ravel(), (len(BODIES), 1)),
            body_xpos=self.places,
        )
        shade = np.uint8(1000 * np.abs(self.places[2]).sum() % 256)
        picture = np.full(self.shape, shade, np.uint8)
        return dict(
            agentview_image=picture,
            robot0_eye_in_hand_image=picture,
            robot0_eef_pos=self.hand,
            robot0_eef_quat=np.array([1.0, 0, 0, 0]),
            robot0_gripper_qpos=np.zeros(2),
            robot0_gripper_qvel=np.zeros(2),
            robot0_joint_pos=np.zeros(7),
            robot0_joint_vel=np.zeros(7),
        )

    def step(self, action):
        action, thing = np.asarray(action, float), self.places[2]
        self.hand = self.hand + 0.025 * action[:3]
        self.yaw += 0.25 * action[5]
        around = (np.abs(self.hand - thing) < [0.02, 0.02, 0.07]).all()
        self.held = bool(around or self.held) and action[6] > 0
        if self.held:
            self.places[2] = thing + 0.025 * action[:3]
        elif thing[2] > 0.1:
            self.places[2, 2] = 0.085
        return self.look(), 0.0, self.check_success(), {}

    def check_success(self):
        off = np.abs(self.places[2] - self.places[3])
        return bool((off[:2] < 0.06).all() and self.places[2, 2] < 0.13)

    def close(self):
        pass
