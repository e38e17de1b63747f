from halo.deploy.serve import PolicyClient


class WebsocketClientPolicy:
    "The interface of openpi's client."

    def __init__(self, host, port, api_key=None):
        address = f'{host}:{port}' if '://' in host else f'ws://{host}:{port}'
        self.client = PolicyClient(address, api_key)

    def get_server_metadata(self):
        return self.client.metadata

    def infer(self, obs):
        return self.client.infer(obs)
