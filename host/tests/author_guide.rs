//! `docs/plugins.md`: its snippets are parts of files that are built and tested, its commands work, its links lead somewhere.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

#[allow(dead_code, reason = "here plugins are real")]
mod fixture;
#[allow(dead_code, reason = "most of it is for devices without a VM")]
#[path = "plugins/objects.rs"]
mod objects;
#[allow(dead_code, reason = "the guide has a VM file of its own")]
#[path = "plugins/vm.rs"]
mod vm;

use std::time::Duration;

use objects::workspace;

struct Block {
    /// Language and text.
    language: String,
    text: String,
    /// The last link before it, from the workspace.
    file: String,
}

fn guide() -> String {
    std::fs::read_to_string(workspace("docs/plugins.md")).unwrap()
}

/// The targets of links in a line.
fn links(line: &str) -> impl Iterator<Item = &str> {
    line.split("](")
        .skip(1)
        .filter_map(|rest| rest.split(')').next())
}

fn blocks() -> Vec<Block> {
    let guide = guide();
    let mut blocks = Vec::new();
    let mut file = String::new();
    let mut open: Option<Block> = None;
    for line in guide.lines() {
        match (&mut open, line.strip_prefix("```")) {
            (None, Some(language)) => {
                open = Some(Block {
                    language: language.to_owned(),
                    text: String::new(),
                    file: file.clone(),
                });
            }
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (Some(block), None) => block.text.push_str(&format!("{line}\n")),
            (None, None) => {
                if let Some(link) = links(line).last() {
                    file = link.trim_start_matches("../").to_owned();
                }
            }
        }
    }
    assert!(
        open.is_none() && blocks.len() > 8,
        "{} blocks",
        blocks.len()
    );
    blocks
}

#[test]
fn every_snippet_is_part_of_the_file_it_names() {
    for block in blocks().iter().filter(|block| block.language != "sh") {
        let text = std::fs::read_to_string(workspace(&block.file)).unwrap();
        assert!(
            text.contains(&block.text),
            "{}:\n{}",
            block.file,
            block.text
        );
    }
}

#[test]
fn every_link_leads_to_a_file() {
    for link in guide().lines().flat_map(links) {
        assert!(workspace("docs").join(link).exists(), "{link}");
    }
}

/// What it says of refusals is what the host says: the test of a skewed table has the same line.
#[test]
fn the_refusal_it_quotes_is_the_real_one() {
    let mut stage = objects::Stage::new();
    let refused = stage.device(&objects::built("vmm-test-plugin-skewed"), &[]);
    let text = format!("{:#}", refused.err().unwrap());
    let quoted = text.split(';').next().unwrap();
    assert!(guide().contains(&format!("`{quoted}`")), "{quoted}");
}

#[test]
fn its_commands_work() {
    let name = "its_commands_work";
    let scene = vm::scene(&["hello-device"]);
    let plugins = scene.path("plugins");
    let blocks = blocks();
    let shell: String = blocks
        .iter()
        .filter(|block| block.language == "sh")
        .map(|block| block.text.as_str())
        .collect();
    let mut count = 0;
    for line in shell
        .lines()
        .filter_map(|line| line.strip_prefix("vmm-host "))
    {
        let words: Vec<&str> = line.split(' ').collect();
        let runs = !words.contains(&"plugins") && !words.contains(&"check");
        if runs && !vm::possible(name) {
            continue;
        }
        let arguments = words.iter().map(|word| match *word {
            "target/debug" => plugins.clone().into_os_string(),
            file if file.ends_with(".toml") => workspace(file).into_os_string(),
            word => word.into(),
        });
        let mut child = scene
            .host()
            .args(arguments)
            .stdin(std::process::Stdio::null())
            .stdout(std::fs::File::create(scene.path("out")).unwrap())
            .spawn()
            .unwrap();
        let status = (0..6000).find_map(|_| {
            std::thread::sleep(Duration::from_millis(10));
            child.try_wait().unwrap()
        });
        let said = std::fs::read_to_string(scene.path("out")).unwrap_or_default();
        let Some(status) = status else {
            child.kill().unwrap();
            panic!("{line} does not end: {said}");
        };
        assert!(status.success(), "{line}: {said}");
        count += 1;
    }
    assert!(count >= 2, "{count} commands");
}
