"""Many devices and many processes: the mesh, where arrays lie on it, how processes join and how they notice each other's end."""
