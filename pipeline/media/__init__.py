"""One source file understood: container, time stamps, sound track, picture, YUV planes, fragments."""
