//! Names that VM files of propolis carry and for which there may be no plugin: what options they take is known all the same,
//! so that such a file is checked as a whole.

use std::path::PathBuf;
use std::sync::{Arc, LazyLock};

use super::manifest_toml::parse_names;
use super::registry::Role;
use super::search::Plugin;

const TEXT: &str = include_str!("../../../configs/profiles/propolis-names.toml");

/// In the form of a plugin, since that is what the options of all others are read from. It can't be loaded. A test says that the
/// text is well-formed.
static NAMES: LazyLock<Option<Arc<Plugin>>> = LazyLock::new(|| {
    let manifest = parse_names(TEXT).ok()?;
    Some(Arc::new(Plugin {
        path: PathBuf::new(),
        directory: usize::MAX,
        manifest,
    }))
});

/// The names known for a role.
pub fn names<'a>(role: Role) -> impl Iterator<Item = &'a str> {
    entries(role).map(|(_, name)| name)
}

/// What is known about a name: an index like that of the registry's entries.
pub fn find(role: Role, name: &str) -> Option<(Arc<Plugin>, usize)> {
    let (index, _) = entries(role).find(|(_, known)| *known == name)?;
    Some((NAMES.clone()?, index))
}

fn entries(role: Role) -> impl Iterator<Item = (usize, &'static str)> {
    let manifest = NAMES.as_ref().map(|plugin| &plugin.manifest);
    let drivers = manifest.map_or(&[][..], |manifest| &manifest.drivers);
    let backends = manifest.map_or(&[][..], |manifest| &manifest.backends);
    let drivers = drivers.iter().map(|driver| (Role::Driver, &driver.name));
    let backends = backends
        .iter()
        .map(|backend| (Role::Backend(backend.kind), &backend.name));
    drivers
        .enumerate()
        .chain(backends.enumerate())
        .filter(move |(_, (other, _))| *other == role)
        .map(|(index, (_, name))| (index, name.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugins::manifest_toml::parse;

    #[test]
    fn the_names_are_well_formed() {
        let manifest = parse_names(TEXT).unwrap();
        assert_eq!(names(Role::Driver).count(), manifest.drivers.len());
        assert!(names(Role::Driver).count() >= 1);
        for (index, driver) in manifest.drivers.iter().enumerate() {
            let (plugin, found) = find(Role::Driver, &driver.name).unwrap();
            assert_eq!((plugin.manifest.name.as_str(), found), ("propolis", index));
        }
    }

    #[test]
    fn a_plugin_may_not_declare_what_it_could_not_be_given() {
        let error = parse(TEXT).unwrap_err().to_string();
        assert!(
            error.contains("`type` in [option]: expected \"bool\""),
            "{error}"
        );
    }
}
