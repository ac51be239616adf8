use super::*;
use crate::plugins::schema::OptionValue;

const GOOD: &str = r#"
abi = "1.0"
name = "store"
version = "0.3.1"
license = "MIT"
[[driver]]
name = "pci-store"
bus = "pci"
state = 3
state_min = 2
[[driver.option]]
name = "queues"
type = "u32"
range = [1, 64]
default = 8
[[driver.option]]
name = "block_dev"
type = "ref:block"
required = true
[[block]]
name = "ram"
[[block.option]]
name = "size"
type = "size"
default = "16M"
"#;

fn refusal(text: &str) -> String {
    parse(text).map_or_else(|error| error.to_string(), |_| panic!("accepted: {text}"))
}

#[test]
fn a_manifest_is_read_with_its_schema() {
    let manifest = parse(GOOD).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(manifest.drivers[0].bus, BusKind::Pci);
    assert_eq!(manifest.drivers[0].state, Some((2, 3)));
    assert_eq!(
        manifest.drivers[0].options[0].default,
        Some(OptionValue::Int(8))
    );
    assert_eq!(manifest.drivers[0].options[0].range, Some((1, 64)));
    assert_eq!(
        manifest.backends[0].options[0].default,
        Some(OptionValue::Int(16 << 20))
    );
}

#[test]
fn each_slip_is_refused_with_its_line() {
    for (old, new, expected) in [
        (
            "range = [1, 64]",
            "range = [64, 1]",
            "line 14: `range` in [option]: expected [min, max]",
        ),
        (
            "default = 8",
            "default = 99",
            "line 15: `default` in [option]: expected an integer from 1 to 64",
        ),
        (
            "type = \"u32\"",
            "type = \"u31\"",
            "line 13: `type` in [option]: expected",
        ),
        (
            "bus = \"pci\"",
            "bsu = \"pci\"",
            "line 6: a driver without `bus` (and 1 more)",
        ),
        (
            "name = \"queues\"",
            "name = \"driver\"",
            "can't be named `driver`",
        ),
        (
            "required = true",
            "required = true\ndefault = \"x\"",
            "no default for a required option",
        ),
        (
            "state_min = 2",
            "state_min = 4",
            "expected an integer from 1 to 3",
        ),
        ("name = \"ram\"", "name = \"r am\"", "expected only letters"),
        ("[[block]]", "[[block", "malformed, line 20"),
        (
            "default = \"16M\"",
            "not_with = \"path\"",
            "line 20: `not_with` names no option: `path`",
        ),
        (
            "default = \"16M\"",
            "image = true",
            "line 22: `image` on an option of type size",
        ),
        (
            "default = \"16M\"",
            "read_only = true",
            "line 22: `read_only` on an option of type size",
        ),
        (
            "type = \"u32\"\nrange = [1, 64]",
            "type = \"readable\"",
            "`default` in [option]: expected no default",
        ),
        (
            "default = \"16M\"",
            "shared = 1",
            "`shared` in [option]: expected `true` or `false`",
        ),
        (
            "range = [1, 64]",
            "shared = true",
            "line 6: an option of a driver can't be `shared`",
        ),
        (
            "bus = \"pci\"",
            "bus = \"pci\"\nos = 1",
            "line 9: `os` in [driver]: expected a string",
        ),
        (
            "type = \"size\"",
            "type = \"address\"",
            "`type` in [option]: expected",
        ),
        (
            "name = \"block_dev\"",
            "name = \"queues\"",
            "two [[option]] are named `queues`",
        ),
    ] {
        assert!(GOOD.contains(old), "{old}");
        let text = refusal(&GOOD.replace(old, new));
        assert!(text.contains(expected), "{new}: {text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    }
}

#[test]
fn another_major_version_is_refused_before_anything_else() {
    let text = refusal("abi = \"2.0\"\nwhatever = 1");
    assert_eq!(
        text,
        "built for plugin ABI 2.0, this host has ABI 1.0: it needs a newer vmm-host"
    );
    assert!(refusal("abi = \"0.9\"").contains("build it against a newer vmm-plugin-api"));
}

#[test]
fn a_later_minor_version_may_say_more() {
    let text = GOOD.replace("abi = \"1.0\"", "abi = \"1.7\"\nsandbox = \"net\"");
    assert!(parse(&text).is_ok());
    assert!(refusal(&text.replace("1.7", "1.0")).contains("has no key `sandbox`"));
}
