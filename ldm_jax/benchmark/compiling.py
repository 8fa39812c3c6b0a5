def run(name, case, settings):
    return []
