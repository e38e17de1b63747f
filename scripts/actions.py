"""The actions of the shipped policies over 60 ticks of a recorded episode, as SHA-256.

A rearrangement of the code that changes no number prints the same before and after.

    python scripts/actions.py
"""

import hashlib

import numpy as np
import torch

from halo.data.files import shipped
from halo.sim.evaluate import load_policy
from halo.viz.recording import Recording

TASK = 'put the puck on the pad that flashed red'


def observation(record, tick):
    "LeRobot's observation of one robot at a tick; the episode begins again when it ends."
    seen = {'task': TASK, 'observation.state': record['state'][tick % len(record['state'])]}
    seen['observation.state'] = torch.from_numpy(seen['observation.state']).float()
    for name, frames in record.items():
        if name.startswith('frames.'):
            frame = torch.from_numpy(np.ascontiguousarray(frames[tick % len(frames)]))
            camera = name.removeprefix('frames.')
            seen[f'observation.images.{camera}'] = frame.permute(2, 0, 1).float() / 255
    return seen


def digest(policy, pre, post, record, ticks=60):
    "SHA-256 over the bytes of `ticks` actions, noise from seed 0."
    made = hashlib.sha256()
    policy.reset()
    torch.manual_seed(0)
    for tick in range(ticks):
        with torch.inference_mode():
            action = post(policy.select_action(pre(observation(record, tick))))
        made.update(action.numpy().tobytes())
    return made.hexdigest()


def main():
    torch.set_num_threads(1)
    folder = shipped('checkpoints/flash_place')
    record = Recording.load(folder / 'recordings/full.safetensors').record
    for name in ('full', 'no_history', 'no_salr'):
        print(name, digest(*load_policy(folder / name), record)[:16])


if __name__ == '__main__':
    main()
