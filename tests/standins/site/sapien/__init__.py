"In the place of SAPIEN: what hides the wrist camera's body asks for one class."

from . import render as render
