class RenderBodyComponent:
    def disable(self):
        self.drawn = False
