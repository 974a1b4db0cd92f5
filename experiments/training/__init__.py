"""What a scripted training run is made of: meshes and shardings, tasks, data, the state and its step."""
