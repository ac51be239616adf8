//! Our own plugins' manifests, as they stand in the source: `docs/options.md` says what they say, and `configs/` fits them.
//!
//! `VMM_UPDATE_GOLDENS=1 cargo test -p vmm-host --test options_page` writes the page anew.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod fixture;

use std::path::{Path, PathBuf};

use fixture::Scene;

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

#[test]
fn the_option_reference_is_current() {
    let ran = Scene::with_our_plugins().run(&["plugins", "--markdown", "--plugin-path", "plugins"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let page = workspace().join("docs/options.md");
    if std::env::var_os("VMM_UPDATE_GOLDENS").is_some() {
        std::fs::write(&page, &ran.stdout).unwrap();
    }
    assert_eq!(
        std::fs::read_to_string(&page).unwrap_or_default(),
        ran.stdout
    );
}

#[test]
fn every_shipped_configuration_is_accepted() {
    let scene = Scene::with_our_plugins();
    for file in ["vmlinuz", "vmlinux", "initrd.img", "disk.img"] {
        scene.write(file, "");
    }
    // Where the package is not installed, its files are elsewhere.
    let installed = std::path::Path::new("/usr/share/OVMF/OVMF_CODE_4M.fd").is_file();
    for file in ["OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd"] {
        scene.write(file, vec![1; 4096]);
    }
    let mut count = 0;
    for entry in std::fs::read_dir(workspace().join("configs")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        let file = path.file_name().unwrap().to_str().unwrap();
        let mut text = std::fs::read_to_string(&path).unwrap();
        if !installed {
            text = text.replace("/usr/share/OVMF/", "");
        }
        scene.write(file, text);
        let ran = scene.run(&["check", file, "--plugin-path", "plugins"]);
        assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{file}");
        count += 1;
    }
    assert!(count >= 2, "only {count} configurations");
    for profile in ["propolis", "minimal", "microvm", "none"] {
        let text = format!(
            "[main]\nname = \"x\"\ncpus = 1\nmemory = 64\nkernel = \"builtin:selftest\"\nprofile = \"{profile}\"\n"
        );
        scene.write("profile.toml", text);
        let ran = scene.run(&["check", "profile.toml", "--plugin-path", "plugins"]);
        assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{profile}");
    }
}

/// A snippet is a VM file but for `[main]`.
#[test]
fn every_snippet_about_disks_is_accepted() {
    let scene = Scene::with_our_plugins();
    scene.write("disk.img", "");
    let page = std::fs::read_to_string(workspace().join("docs/disks.md")).unwrap();
    let snippets: Vec<&str> = page
        .split("```toml\n")
        .skip(1)
        .filter_map(|rest| rest.split("```").next())
        .collect();
    assert!(snippets.len() >= 4, "{snippets:?}");
    for snippet in snippets {
        let main = "[main]\nname = \"x\"\ncpus = 1\nmemory = 64\nkernel = \"builtin:selftest\"\n";
        scene.write("snippet.toml", format!("{main}\n{snippet}"));
        let ran = scene.run(&["check", "snippet.toml", "--plugin-path", "plugins"]);
        let got = (ran.code, ran.stderr.as_str());
        assert_eq!(got, (Some(0), ""), "{snippet}");
    }
}
