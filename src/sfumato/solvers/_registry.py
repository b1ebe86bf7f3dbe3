from sfumato.core import Registry

registry = Registry("solver", "sfumato.solvers")
get, names, register = registry.get, registry.names, registry.register
