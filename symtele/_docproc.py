"What notebooks pass through on their way into git (nbconvert) and onto the site (nbdev)"
import ast, json, re
from functools import cache
from html import escape
from importlib import import_module
from io import StringIO
from itertools import groupby
from pathlib import Path
from tokenize import COMMENT, generate_tokens

from execnb.nbio import mk_cell
from nbconvert.preprocessors import Preprocessor
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
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

DEFS = ast.FunctionDef, ast.ClassDef

@cache
def parsed(module):
    "Its definitions by name, and the comment at each line"
    text = Path(import_module(module).__file__).read_text(encoding='utf-8')
    comments = {t.start[0]: t.string.lstrip('# ') for t in generate_tokens(StringIO(text).readline) if t.type==COMMENT}
    return {t.name: t for t in ast.parse(text).body if isinstance(t, DEFS)}, comments

def prose(text):
    "A comment or docstring as markdown: names of the package become links, and nothing else is markup"
    parts = re.split('(`[^`]*`)', text) # what is code, and what is between
    return NbdevLookup().link_line(''.join(p if i%2 else re.sub(r'([][\\*_^~$@<>|#{}])', r'\\\1', p) for i,p in enumerate(parts)))

def typed(node): return '' if node is None else prose(ast.unparse(node).strip("'").replace('|', 'or')) # a bar would end the cell of a table

def arguments(node, says, skip=0):
    "(name, default, type, comment) of each argument after the first `skip`"
    a = node.args; plain = a.posonlyargs+a.args
    pairs = list(zip(plain, [None]*(len(plain)-len(a.defaults))+a.defaults))[skip:]
    star = [('*', a.vararg, None)] if a.vararg else [('*', ast.arg(''), None)]*bool(a.kwonlyargs)
    rows = [('', *p) for p in pairs]+star+[('', *p) for p in zip(a.kwonlyargs, a.kw_defaults)]+[('**', a.kwarg, None)]*bool(a.kwarg)
    return [(stars+p.arg, ast.unparse(d) if d else '', typed(p.annotation), prose(says.get(getattr(d or p, 'end_lineno', 0), ''))) for stars,p,d in rows]

def fields(cls, says):
    "The same of a dataclass or named tuple"
    return [(f.target.id, ast.unparse(f.value) if f.value else '', typed(f.annotation), prose(says.get(f.end_lineno, ''))) for f in cls.body if isinstance(f, ast.AnnAssign)]

def call(name, rows): return f"{name}({', '.join(n+('='+d)*bool(d) for n,d,*_ in rows)})"

def table(rows): return ['', '| parameter | | |', '|:---|:---|:---------|', *[f"| {' | '.join(r)} |" for r in rows]]*bool(rows)

def method(cls, f, says):
    "A line of the list of methods"
    decorators = ' '.join(map(ast.unparse, f.decorator_list))
    rows = arguments(f, says, 'staticmethod' not in decorators)
    what = '; '.join([prose(ast.get_docstring(f)), *[f'<code>{n}</code>: {s}' for n,_,_,s in rows if s]])
    returns = f' → {typed(f.returns)}'*bool(f.returns)
    return f'- <code id="{cls.lower()}.{f.name}">{escape(f.name if "property" in decorators else call(f.name, rows))}</code>{returns}: {what}'

def entry(module, name, url):
    "The API entry of a function or class: source, signature, what it is, parameters, public methods; `url`: where the source of the package is"
    (defs,says),back,methods,rows = parsed(module),[],[],[]
    node = defs[name]
    if isinstance(node, ast.ClassDef):
        for base in getattr(import_module(module), name).__mro__[::-1]:
            if base.__module__.split('.')[0]!=module.split('.')[0]: continue
            b,c = parsed(base.__module__); b = b[base.__name__]
            init = [f for f in b.body if isinstance(f, DEFS) and f.name=='__init__']; own = fields(b, c)
            rows = arguments(init[0], c, 1) if init else [r for r in rows if r[0] not in [n for n,*_ in own]]+own
        methods = [method(name, f, says) for f in node.body if isinstance(f, DEFS) and f.name[0]!='_' and ast.get_docstring(f)]
    else:
        rows = arguments(node, says)
        if node.returns: back = [('**returns**', typed(node.returns), prose(says.get(node.returns.lineno, '')))]
    return '\n'.join(['---', '', f"[source]({url}/{module.replace('.', '/')}.py#L{node.lineno}){{style='float:right; font-size:smaller'}}", '',
        f'### {name}', '', '```python', call(name, rows), '```', '', prose(ast.get_docstring(node) or ''),
        *table([(f'<code>{n}</code>', t, says) for n,_,t,says in rows if n!='*']+back), '', *methods])

class ApiEntries(Processor):
    """What stands on a page for an exported cell: entries made from the package itself, the source folded beneath; tables of values stay open.
    nbdev's own way executes the cells again, where a dataclass has lost its comments and a name two modules share is the first one's, and drops all source."""
    def begin(self):
        names = [c.directives_['default_exp'][0] for c in self.nb.cells if 'default_exp' in c.get('directives_', {})]
        if not names: return
        self.module = f'{get_config().lib_name}.{names[0]}'; self.nb.cells = [new for c in self.nb.cells for new in self.replaced(c)]
        to,own = NbdevLookup().doc,parsed(self.module)[0] # of two modules with a name, nbdev links to the first
        for a,b in {(to(n), to(f'{self.module}.{n}')) for n in own if to(n)!=to(f'{self.module}.{n}')}:
            for c in self.nb.cells:
                if c.cell_type=='markdown': c.source = c.source.replace(f'({a})', f'({b})')
    def replaced(self, cell):
        "The cells that stand for one"
        dirs,module,cfg = cell.get('directives_', {}),import_module(self.module),get_config()
        if 'export' not in dirs: return [cell]*('default_exp' not in dirs)
        tree = ast.parse(cell.source).body
        if any(isinstance(t, (ast.Import, ast.ImportFrom)) for t in tree): return []
        defined = [t.name for t in tree if isinstance(t, DEFS)]
        values = [n.id for t in tree if isinstance(t, ast.Assign) for o in t.targets for n in ast.walk(o) if isinstance(n, ast.Name)]
        out = [mk_cell(entry(self.module, n, f'{cfg.git_url}/blob/{cfg.branch}'), 'markdown') for n in defined if n in module.__all__]
        values = [f'<code id="value.{n}">{n}</code>, {prose(type(getattr(module, n)).__name__)}' for n in values if n in module.__all__]
        if values: out.append(mk_cell('\n\n'.join(values), 'markdown'))
        if defined: cell.source = f'#| code-fold: true\n#| code-summary: "Source"\n{cell.source}'
        return out+[cell]

def blocks(text):
    "Pairs: whether these lines are a table, two or more with columns in them, and the lines"
    groups = [(columns, list(ls)) for columns,ls in groupby(text.splitlines(), lambda l: bool(re.search(r'\S {2,}\S', l)))]
    return [(columns and len(ls)>1, '\n'.join(ls)) for columns,ls in groups]

class WholeTables(Processor):
    "On a page printed sentences wrap; the lines of a printed table stay whole, in a box that moves sideways"
    def cell(self, cell):
        for i,o in enumerate(cell.get('outputs', [])):
            parts = blocks(''.join(o['text'])) if o['output_type']=='stream' else []
            if not any(t for t,_ in parts): continue
            page = ''.join(f'<pre{" class=symtele-table"*t}>{escape(lines)}</pre>' for t,lines in parts if lines.strip())
            cell.outputs[i] = dict(output_type='display_data', metadata={}, data={'text/html': page})
