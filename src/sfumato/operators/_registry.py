from sfumato.core import Registry

registry = Registry("operator", "sfumato.operators")
get, names, register = registry.get, registry.names, registry.register
