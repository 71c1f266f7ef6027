//! Go templates as `--format` takes them, in the stock CLI's dialect: its functions, `\t` and `\n`
//! written out, `.Label "key"`. Fields and functions are checked before anything is printed, also
//! where there is nothing to print.

use std::{collections::BTreeSet, fmt, str::FromStr, sync::Arc};

use gotmpl::{
    FuncMap, TemplateError, Value,
    parse::{BranchNode, CommandNode, Expr, ListNode, Node, Parser, PipeNode},
};
use serde_json::Value as Json;

use crate::unknown::did_you_mean;

/// A template that parses, and whose functions exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Template(String);

/// gotmpl's own functions, which are Go's.
const BUILTIN: &[&str] = &[
    "and", "call", "eq", "ge", "gt", "html", "index", "js", "le", "len", "lt", "ne", "not", "or",
    "print", "printf", "println", "slice", "urlquery",
];
/// The stock CLI's.
const OWN: &[&str] = &["join", "json", "lower", "pad", "split", "title", "truncate", "upper"];
/// Objects whose keys are the user's own.
const FREE: &[&str] = &["Labels", "Options", "DriverOpts", "Containers", "Services", "Info"];
/// The longest result of `pad`.
const PADDED_MAX: usize = 64 << 10;
/// The template's own name.
const NAME: &str = "format";

impl FromStr for Template {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let template = Self(text.replace("\\t", "\t").replace("\\n", "\n"));
        let known: BTreeSet<&str> = BUILTIN.iter().chain(OWN).copied().collect();
        for name in template.uses().map_err(|err| err.to_string())?.functions {
            if !known.contains(&name[..]) {
                let hint = did_you_mean(&name, known.iter().copied(), "");
                let known = known.into_iter().collect::<Vec<_>>().join(", ");
                return Err(format!("there is no function `{name}`{hint}; there are {known}"));
            }
        }
        Ok(template)
    }
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Template {
    /// What the template makes of an object.
    pub(crate) fn render(&self, object: &Json) -> Result<String, String> {
        self.run(&value(object), false)
    }

    /// What the template makes of the headings: functions leave them as they are.
    pub(crate) fn render_heading(&self, headings: &Json) -> Result<String, String> {
        self.run(&value(headings), true)
    }

    fn run(&self, data: &Value, heading: bool) -> Result<String, String> {
        let teach = |err: TemplateError| format!("template `{self}`: {err}");
        let (mut tree, defines) = self.parse().map_err(teach)?;
        tree.nodes.iter_mut().for_each(call_label);
        let mut template = gotmpl::Template::new(NAME).funcs(functions(heading));
        for mut define in defines {
            define.body.nodes.iter_mut().for_each(call_label);
            template = template.add_parse_tree(&define.name, define.body);
        }
        let template = template.add_parse_tree(NAME, tree);
        template.execute_template_to_string(NAME, data).map_err(teach)
    }

    fn parse(&self) -> Result<(ListNode, Vec<gotmpl::parse::DefineNode>), TemplateError> {
        Parser::new(&self.0, "{{", "}}")?.parse()
    }

    /// Refuses fields that are not among those known, which are listed for those who look for one.
    pub(crate) fn check_fields(
        &self,
        known: &BTreeSet<String>,
        listed: &BTreeSet<String>,
    ) -> Result<(), String> {
        for path in self.uses().map_err(|err| err.to_string())?.paths {
            for name in &path {
                if !known.contains(name) {
                    let hint = did_you_mean(name, known.iter().map(String::as_str), ".");
                    let fields = listed.iter().map(|field| format!(".{field}")).collect::<Vec<_>>();
                    return Err(format!(
                        "there is no field `.{}` here{hint}; there are {}",
                        path.join("."),
                        fields.join(" ")
                    ));
                }
                if FREE.contains(&&name[..]) {
                    break;
                }
            }
        }
        Ok(())
    }

    fn uses(&self) -> Result<Uses, TemplateError> {
        let (tree, defines) = self.parse()?;
        let mut uses = Uses::default();
        uses.list(&tree);
        defines.iter().for_each(|define| uses.list(&define.body));
        Ok(uses)
    }
}

/// What a template names.
#[derive(Debug, Default)]
struct Uses {
    paths: Vec<Vec<String>>,
    functions: Vec<String>,
}

impl Uses {
    fn list(&mut self, list: &ListNode) {
        for node in &list.nodes {
            match node {
                Node::List(list) => self.list(list),
                Node::Action(action) => self.pipe(&action.pipe),
                Node::If(branch) | Node::Range(branch) | Node::With(branch) => self.branch(branch),
                Node::Template(template) => {
                    template.pipe.iter().for_each(|pipe| self.pipe(pipe));
                }
                Node::Define(define) => self.list(&define.body),
                Node::Text(_) | Node::Break(_) | Node::Continue(_) => {}
            }
        }
    }

    fn branch(&mut self, branch: &BranchNode) {
        self.pipe(&branch.pipe);
        self.list(&branch.body);
        branch.else_body.iter().for_each(|body| self.list(body));
    }

    fn pipe(&mut self, pipe: &PipeNode) {
        pipe.commands.iter().flat_map(|command| &command.args).for_each(|expr| self.expr(expr));
    }

    fn expr(&mut self, expr: &Expr) {
        let path = |path: &[gotmpl::parse::SmolStr]| path.iter().map(ToString::to_string).collect();
        match expr {
            Expr::Field(_, fields) | Expr::Variable(_, _, fields) => self.paths.push(path(fields)),
            Expr::Chain(_, inner, fields) => {
                self.expr(inner);
                self.paths.push(path(fields));
            }
            Expr::Identifier(_, name) => self.functions.push(name.to_string()),
            Expr::Pipe(_, pipe) => self.pipe(pipe),
            _ => {}
        }
    }
}

/// A method of Go's rows: `.Label "key"` becomes a call of the function in that field.
fn call_label(node: &mut Node) {
    let list = |list: &mut ListNode| list.nodes.iter_mut().for_each(call_label);
    match node {
        Node::List(inner) => list(inner),
        Node::Action(action) => call_label_in(&mut action.pipe),
        Node::If(branch) | Node::Range(branch) | Node::With(branch) => {
            call_label_in(&mut branch.pipe);
            list(&mut branch.body);
            branch.else_body.iter_mut().for_each(list);
        }
        _ => {}
    }
}

fn call_label_in(pipe: &mut PipeNode) {
    for CommandNode { pos, args } in &mut pipe.commands {
        for arg in &mut *args {
            if let Expr::Pipe(_, inner) = arg {
                call_label_in(inner);
            }
        }
        let label = matches!(&args[..], [Expr::Field(_, path), _] if path[..] == ["Label"]);
        if label {
            args.insert(0, Expr::Identifier(*pos, "call".into()));
        }
    }
}

/// The functions of the stock CLI. In a table's heading they pass on what they are given.
fn functions(heading: bool) -> FuncMap {
    let mut map = FuncMap::new();
    for name in OWN {
        let function =
            move |args: &[Value]| if heading { kept(name, args) } else { own(name, args) };
        map.insert((*name).to_owned(), Arc::new(function));
    }
    map
}

fn kept(name: &str, args: &[Value]) -> gotmpl::Result<Value> {
    args.first().cloned().ok_or_else(|| failed(format!("{name} needs something to work on")))
}

fn failed(text: String) -> TemplateError {
    TemplateError::Exec(text)
}

fn own(name: &str, args: &[Value]) -> gotmpl::Result<Value> {
    let text = |value: &Value| match value {
        Value::Nil => String::new(),
        other => other.to_string(),
    };
    let length = |value: &Value| {
        let length = match value {
            Value::Int(n) => usize::try_from(*n).ok(),
            Value::Uint(n) => usize::try_from(*n).ok(),
            _ => None,
        };
        length.ok_or_else(|| failed(format!("{name} needs a length, not `{value}`")))
    };
    let made = match (name, args) {
        ("json", [value]) => json(value).to_string(),
        ("lower", [value]) => text(value).to_lowercase(),
        ("upper", [value]) => text(value).to_uppercase(),
        ("title", [value]) => titled(&text(value)),
        ("split", [value, separator]) => {
            let (whole, separator) = (text(value), text(separator));
            let parts: Vec<Value> = if separator.is_empty() {
                whole.chars().map(|c| Value::String(c.to_string().into())).collect()
            } else {
                whole.split(&separator[..]).map(|part| Value::String(part.into())).collect()
            };
            return Ok(Value::List(parts.into()));
        }
        ("join", [Value::List(items), separator]) => {
            items.iter().map(text).collect::<Vec<_>>().join(&text(separator))
        }
        ("join", [Value::Nil, _]) => String::new(),
        ("join", [other, _]) => {
            return Err(failed(format!("join needs a list, not a {}", other.type_name())));
        }
        ("pad", [value, before, after]) => {
            let (whole, before, after) = (text(value), length(before)?, length(after)?);
            if before.saturating_add(after) > PADDED_MAX {
                return Err(failed(format!("pad makes at most {PADDED_MAX} blanks")));
            }
            match whole.is_empty() {
                true => whole,
                false => format!("{}{whole}{}", " ".repeat(before), " ".repeat(after)),
            }
        }
        ("truncate", [value, most]) => text(value).chars().take(length(most)?).collect(),
        _ => return Err(failed(format!("{name} does not take {} arguments", args.len()))),
    };
    Ok(Value::String(made.into()))
}

/// With each word's first letter as Go's `strings.Title` makes it.
fn titled(text: &str) -> String {
    let mut start = true;
    let mut made = String::with_capacity(text.len());
    for c in text.chars() {
        if std::mem::take(&mut start) {
            made.extend(c.to_uppercase());
        } else {
            made.push(c);
        }
        start =
            if c.is_ascii() { !c.is_ascii_alphanumeric() && c != '_' } else { c.is_whitespace() };
    }
    made
}

/// An object for templates. Go has two names for some fields: that of JSON and its own.
fn value(json: &Json) -> Value {
    match json {
        Json::Null => Value::Nil,
        Json::Bool(bool) => Value::Bool(*bool),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(int), _) => Value::Int(int),
            (None, Some(uint)) => Value::Uint(uint),
            (None, None) => Value::Float(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::String(text.as_str().into()),
        Json::Array(items) => Value::List(items.iter().map(value).collect()),
        Json::Object(fields) => {
            let mut map: std::collections::BTreeMap<Arc<str>, Value> =
                fields.iter().map(|(key, field)| (key.as_str().into(), value(field))).collect();
            for (of_json, of_go) in ALIASES {
                if let (Some(field), None) = (map.get(*of_json).cloned(), map.get(*of_go)) {
                    map.insert((*of_go).into(), field);
                }
            }
            if let Some(Json::Object(labels)) = fields.get(LABEL_MAP) {
                map.remove(LABEL_MAP);
                map.insert("Label".into(), label_function(labels.clone()));
            }
            Value::Map(Arc::new(map))
        }
    }
}

/// Names of JSON, and Go's.
pub(super) const ALIASES: &[(&str, &str)] = &[("Id", "ID"), ("ApiVersion", "APIVersion")];
/// Where a row keeps its labels for `.Label "key"`.
pub(super) const LABEL_MAP: &str = "\0labels";

fn label_function(labels: serde_json::Map<String, Json>) -> Value {
    Value::Function(Arc::new(move |args: &[Value]| match args {
        [key] => Ok(value(labels.get(&key.to_string()).unwrap_or(&Json::String(String::new())))),
        _ => Err(failed("use .Label \"key\"".to_owned())),
    }))
}

/// A value as JSON, under JSON's names alone.
fn json(value: &Value) -> Json {
    match value {
        Value::Bool(bool) => Json::Bool(*bool),
        Value::Int(int) => Json::from(*int),
        Value::Uint(uint) => Json::from(*uint),
        Value::Float(float) => Json::from(*float),
        Value::String(text) => Json::from(&**text),
        Value::List(items) => items.iter().map(json).collect(),
        Value::Map(fields) => {
            let alias = |key: &str| {
                ALIASES.iter().any(|(of_json, go)| *go == key && fields.contains_key(*of_json))
            };
            let fields = fields
                .iter()
                .filter(|(key, field)| !alias(key) && !matches!(field, Value::Function(_)))
                .map(|(key, field)| (key.to_string(), json(field)));
            Json::Object(fields.collect())
        }
        Value::Nil | Value::Function(_) => Json::Null,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn made(text: &str, object: &Json) -> String {
        text.parse::<Template>().unwrap().render(object).unwrap()
    }

    #[test]
    fn the_stock_clis_functions_do_what_they_do_there() {
        let row = json!({"Name": "web api", "List": ["a", "b"], "N": 3, "Big": u64::MAX,
            "Ratio": 0.5, "None": null, "Self": true, "Html": "<a>&"});
        for (text, expected) in [
            ("{{.Name}}: {{.N}}", "web api: 3"),
            ("{{json .Html}} {{json .List}}", r#""<a>&" ["a","b"]"#),
            ("{{json .}}", &row.to_string()[..]),
            (r#"{{join .List ", "}}|{{join .None "x"}}"#, "a, b|"),
            (r#"{{index (split .Name " ") 1}} {{split .Name ""  | len}}"#, "api 7"),
            ("{{upper .Name}} {{lower \"AB\"}} {{title .Name}}", "WEB API ab Web Api"),
            ("[{{pad .Name 1 2}}][{{pad \"\" 3 3}}]", "[ web api  ][]"),
            ("{{truncate .Name 3}}{{truncate \"é\" 5}}", "webé"),
            ("{{println .Name}}", "web api\n"),
            (r"{{.Name}}\t{{.N}}\n", "web api\t3\n"),
            ("{{if .Self}}*{{end}}{{with .None}}x{{else}}-{{end}}", "*-"),
            ("{{range $i, $x := .List}}{{$i}}{{$x}}{{end}}", "0a1b"),
            ("{{.Big}} {{.Ratio}} {{printf \"%05d\" .N}}", "18446744073709551615 0.5 00003"),
            ("{{.Name | upper | json}}", "\"WEB API\""),
        ] {
            assert_eq!(made(text, &row), expected, "{text}");
        }
    }

    #[test]
    fn fields_have_gos_names_too_and_json_has_its_own() {
        let network = json!({"Id": "n1", "Labels": {"a": "b"}});
        assert_eq!(made("{{.ID}} {{.Id}} {{.Labels.a}}", &network), "n1 n1 b");
        assert_eq!(made("{{json .}}", &network), network.to_string());
        let row = json!({"Name": "x", LABEL_MAP: {"a": "b"}});
        let text = r#"{{.Label "a"}}{{if eq (.Label "a") "b"}}!{{end}}[{{.Label "c"}}]{{json .}}"#;
        assert_eq!(made(text, &row), r#"b![]{"Name":"x"}"#);
    }

    #[test]
    fn headings_pass_through_functions() {
        let headings = json!({"Name": "NAME", "ID": "SERVICE ID"});
        let template: Template =
            "{{lower .Name}} {{json .ID}} {{truncate .ID 3}} {{join (split .Name \"x\") \"\"}}"
                .parse()
                .unwrap();
        let heading = template.render_heading(&headings).unwrap();
        assert_eq!(heading, "NAME SERVICE ID SERVICE ID NAME");
    }

    #[test]
    fn errors_teach() {
        let parsed = |text: &str| text.parse::<Template>().unwrap_err();
        assert!(parsed("{{.Name").contains("unclosed action"));
        let unknown = parsed("{{jsn .}}");
        assert!(unknown.contains("`jsn`") && unknown.contains("did you mean `json`?"), "{unknown}");
        assert!(unknown.contains("truncate"), "{unknown}");
        let known = BTreeSet::from(["Name".to_owned(), "Labels".to_owned()]);
        let check = |text: &str| text.parse::<Template>().unwrap().check_fields(&known, &known);
        let unknown = check("{{range .Name}}{{.Nmae}}{{end}}").unwrap_err();
        let expected =
            "there is no field `.Nmae` here; did you mean `.Name`?; there are .Labels .Name";
        assert_eq!(unknown, expected);
        assert_eq!(check("{{.Labels.anything}}{{$.Name}}"), Ok(()));
        assert!(check("{{$x := .Name}}{{$x.Bogus}}").is_err());
        let failed = |text: &str| text.parse::<Template>().unwrap().render(&json!({"A": 1}));
        assert!(failed("{{join .A \",\"}}").unwrap_err().contains("a list, not a int"));
        assert!(failed("{{pad .A 1}}").unwrap_err().contains("2 arguments"));
        assert!(failed("{{pad .A 99999999 1}}").unwrap_err().contains("at most"));
    }

    #[test]
    fn every_function_that_is_listed_exists() {
        for name in BUILTIN.iter().chain(OWN) {
            let text = format!("{{{{{name}}}}}");
            if let Err(err) = text.parse::<Template>().unwrap().render(&json!({})) {
                assert!(!err.contains("undefined"), "{err}");
            }
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_template_or_an_error(text in "(\\{\\{|\\}\\}|[a-z. |$()\"0-9{}-]){0,24}") {
            if let Ok(template) = text.parse::<Template>() {
                let _ = template.render(&json!({"a": {"b": [1, "x"]}, "c": null}));
                let known = BTreeSet::from(["a".to_owned()]);
                let _ = template.check_fields(&known, &known);
            }
        }
    }
}
