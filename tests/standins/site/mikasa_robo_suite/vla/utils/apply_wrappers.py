def apply_mikasa_vla_wrappers(env, include_overlays):
    return env.unwrapped
