"""Sphinx configuration."""

project = 'nova-fakedax'
copyright = 'nova-fakedax developers'
extensions = [
    'openstackdocstheme',
    'oslo_config.sphinxconfiggen',
    'oslo_config.sphinxext',
    'sphinx_feature_classification.support_matrix',
]
html_theme = 'openstackdocs'
pygments_style = 'native'
openstackdocs_repo_name = 'nova-fakedax'
openstackdocs_auto_name = False
openstackdocs_auto_version = False
version = release = ''
exclude_patterns = []
config_generator_config_file = [
    ('../../etc/oslo-config-generator/nova-fakedax.conf',
     '_static/nova-fakedax'),
]
