"In the place of LIBERO's suites."

from types import SimpleNamespace


class Suite:
    def __init__(self):
        names = 'milk', 'orange_juice'
        self.tasks = [
            SimpleNamespace(
                name=f'pick_up_the_{n}_and_place_it_in_the_basket',
                language=f'pick up the {n.replace("_", " ")} and place it in the basket',
                problem_folder='libero_object',
                bddl_file=f'{n}.bddl',
                init_states_file=f'{n}.npz',
            )
            for n in names
        ]
        self.n_tasks = len(names)

    def get_task(self, i):
        return self.tasks[i]


def get_benchmark_dict():
    return dict(libero_object=Suite)
