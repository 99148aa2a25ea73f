"What notebooks pass through on their way into git (nbconvert) and onto the site (nbdev); neither changes what a reader sees"
import json, re

from nbconvert.preprocessors import Preprocessor
from nbdev.process import Processor
from nbformat import from_dict

def _models(nb): return nb['metadata'].get('widgets', {}).get('application/vnd.jupyter.widget-state+json', {}).get('state', {})

class CanonicalIds(Preprocessor):
    "Number widget models in order of creation, so that a second run of a notebook gives the same file"
    def preprocess(self, nb, resources):
        number = {k: f'{i:032x}' for i,k in enumerate(_models(nb))}
        return from_dict(json.loads(re.sub('[0-9a-f]{32}', lambda m: number.get(m[0], m[0]), json.dumps(nb)))), resources

class _Lines(list):
    "A list where execnb expects text"
    def splitlines(self, keepends=False): return list(self)

class KeepLinks(Processor):
    "Let the state of a jslink through: execnb splits whatever is called `source` into lines, and there it is a list"
    def end(self):
        for m in _models(self.nb).values():
            if isinstance(s := m.get('state', {}).get('source'), list): m['state']['source'] = _Lines(s)
