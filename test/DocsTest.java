import static org.assertj.core.api.Assertions.assertThat;

import com.fasterxml.jackson.core.JsonParser;
import com.fasterxml.jackson.databind.*;
import com.fasterxml.jackson.databind.introspect.*;
import com.fasterxml.jackson.dataformat.yaml.YAMLFactory;
import io.fabric8.kubernetes.api.model.*;
import java.io.*;
import java.nio.charset.StandardCharsets;
import java.nio.file.*;
import java.util.*;
import java.util.regex.Pattern;
import java.util.stream.*;
import org.junit.jupiter.api.Test;

/** Holds the documents and configmap.yaml to the script, to Kubernetes' own model and to themselves. */
class DocsTest {

    static final String README = read(Path.of("README.md"));
    private static final List<String> DOCUMENTS =
            List.of("README.md", "test/README.md", ".github/CONTRIBUTING.md", ".github/SECURITY.md");
    /** The files that name a version of something. */
    private static final List<String> VERSIONED =
            List.of("README.md", "buildkit-prestop.java", "configmap.yaml", "test/Tests.java", "test/jbang");
    static final ObjectMapper YAML = new ObjectMapper(new YAMLFactory())
            .enable(JsonParser.Feature.STRICT_DUPLICATE_DETECTION)
            .setAnnotationIntrospector(new JacksonAnnotationIntrospector() {
                /** No field is welcome that the model does not name. */
                @Override
                public Boolean hasAnySetter(Annotated method) { return false; }
            });

    // ---- configmap.yaml --------------------------------------------------------------------------------------------

    @Test
    void configMapHoldsExactlyTheScriptAndCanBeReadByPeople() throws IOException {
        String text = read(Path.of("configmap.yaml"));
        ConfigMap map = YAML.readValue(text, ConfigMap.class);
        assertThat(map.getMetadata().getName()).isEqualTo("buildkit-prestop");
        assertThat(map.getData()).as(".github/CONTRIBUTING.md tells how it is made")
                .isEqualTo(Map.of("buildkit-prestop.java", read(Hook.SCRIPT)));
        assertThat(text).as("a tab or a blank at a line's end in the script spoils it")
                .contains("\n  buildkit-prestop.java: |\n");
    }

    // ---- The documents ---------------------------------------------------------------------------------------------

    @Test
    void readmeIsShort() {
        assertThat(README.getBytes(StandardCharsets.UTF_8)).hasSizeLessThanOrEqualTo(17_000);
        assertThat(saved("prestop.yaml").lines()).hasSizeLessThanOrEqualTo(42);
        assertThat(saved("image.yaml").lines()).hasSizeLessThanOrEqualTo(17);
        assertThat(saved("baked.yaml").lines()).hasSizeLessThanOrEqualTo(15);
        assertThat(README.lines().filter(line -> !line.startsWith("|"))).allMatch(line -> line.length() <= 120);
    }

    @Test
    void everyBlockIsOfALanguageThatIsChecked() {
        assertThat(found("(?m)^```(.+)$", README)).containsOnly("yaml", "dockerfile", "sh", "console");
        blocks("sh").forEach(DocsTest::assertParses);
    }

    @Test
    void demoPrintsWhatIsShown() {
        List<String> shown = blocks("console").get(0).lines().toList();
        assertThat(shown.get(0)).isEqualTo("$ test/demo");
        Hook.javaCommand(); // compiles the script: later JBang has nothing to say about that
        try (Hook demo = Hook.run(List.of("test/demo"), Hook.env("HOME", Tools.HOME, "JBANG_DIR", Tools.JBANG_DIR))) {
            assertThat(demo.exitCode()).as(demo.err().toString()).isZero();
            assertThat(demo.out()).map(DocsTest::withoutPortsAndTimes)
                    .isEqualTo(shown.stream().skip(1).map(DocsTest::withoutPortsAndTimes).toList());
        }
    }

    private static String withoutPortsAndTimes(String line) {
        return line.replaceAll("(?<=port |:)\\d+", "PORT").replaceAll("\\d+(?= s )", "TIME");
    }

    @Test
    void everyDockerfileCopiesWhatIsThereAndRunsWhatParses() {
        String all = String.join("", blocks("dockerfile")).replace("\\\n", "");
        assertThat(found(" AS (\\w+)", all)).containsAll(found("--from=(\\S+)", all));
        assertThat(found("(?m)^COPY (?!--from)(?:--\\S+ )?([^-<\\s]\\S*)", all)).isNotEmpty()
                .allSatisfy(file -> assertThat(Path.of(file)).exists());
        found("(?m)^RUN (.*)", all).forEach(DocsTest::assertParses);
        found("(?s)<<'EOF' \\S+\n(.*?\n)EOF\n", all).forEach(DocsTest::assertParses);
    }

    @Test
    void dockerfileReadsTheScriptsHeader() {
        String run = found("(?m)^RUN (header.*)", blocks("dockerfile").get(0).replace("\\\n", "")).get(0);
        String tools = "mvn() { echo mvn \"$@\"; }; javac() { echo javac \"$@\"; }; jlink() { echo jlink \"$@\"; }; ";
        try (Hook sh = Hook.run(List.of("sh", "-c", tools + run), Map.of())) {
            assertThat(sh.exitCode()).as(sh.err().toString()).isZero();
            assertThat(sh.out()).map(line -> line.strip().replaceAll(" +", " ")).containsExactly(
                    "mvn -q dependency:copy -Dartifact=" + header("DEPS") + " -DoutputDirectory=/hook",
                    "javac " + header("JAVAC_OPTIONS") + " -cp /hook/* -d /hook buildkit-prestop.java",
                    "jlink --add-modules java.base --output /java --add-options " + header("JAVA_OPTIONS"));
        }
    }

    private static String header(String directive) { return String.join(" ", Hook.directive(directive)); }

    @Test
    void everyLinkLeadsToAFileAndToAHeading() {
        for (String document : DOCUMENTS) {
            for (String target : found("]\\((?!https?:)([^)\\s]+)\\)", read(Path.of(document)))) {
                Path file = target.startsWith("#") ? Path.of(document)
                        : Path.of(document).resolveSibling(target.replaceFirst("#.*", "")).normalize();
                assertThat(file).as(document + ": " + target).exists();
                if (target.contains("#")) {
                    assertThat(found("(?m)^#+ (.*)", read(file))).as(document + ": " + target)
                            .anyMatch(heading -> target.endsWith("#" + heading.toLowerCase()
                                    .replaceAll("[^\\w\\- ]", "").replace(' ', '-')));
                }
            }
        }
    }

    @Test
    void testReadmeNamesEveryFileBesideIt() {
        assertThat(Path.of("test").toFile().list()).filteredOn(file -> !file.equals("README.md"))
                .allSatisfy(file -> assertThat(read(Path.of("test/README.md"))).contains("](" + file + ")"));
    }

    @Test
    void settingsTableAgreesWithHelp() {
        // A flag: --port=PORT port that buildkitd listens on (BUILDKITD_PORT) Default: 1234
        String flag = "^(--[a-z-]+)(?:=[A-Z]+)? (.*?)(?: \\(([A-Z_]+)\\))?(?: Default: (.*))?$";
        String help = help(" --", "-h, --help").replaceAll(" \\(([A-Z_]+): (.*?)\\)", "; the variable: $2 ($1)");
        assertThat(table("| environment | flag | default | meaning |")).isEqualTo(Stream.of(help.split(" (?=--)"))
                .map(text -> text.replaceFirst(flag, "| $3 | $1 | $4 | $2 |").replaceAll(" +", " ")).toList());
    }

    @Test
    void exitCodeTableAgreesWithHelp() {
        String rows = String.join(" ", table("| code | meaning |")).replaceAll("[| ]+", " ").strip();
        assertThat(help("Exit codes:", "A flag wins")).isEqualTo("Exit codes: " + rows);
    }

    @Test
    void renovateSeesEveryMentionOfAVersion() {
        List<String> seen = new ArrayList<>();
        for (JsonNode manager : Hook.json(read(Path.of(".github/renovate.json"))).path("customManagers")) {
            String files = manager.path("managerFilePatterns").valueStream().map(JsonNode::asText)
                    .map(pattern -> pattern.replaceAll("^/|/$", "")).collect(Collectors.joining("|"));
            for (String file : VERSIONED.stream().filter(file -> file.matches(files)).toList()) {
                manager.path("matchStrings").forEach(regex -> seen.addAll(found(regex.asText(), read(Path.of(file)))));
            }
        }
        String text = VERSIONED.stream().map(file -> read(Path.of(file))).collect(Collectors.joining());
        for (String place : List.of("\nversion=(\\S+)", "BASE=moby/buildkit:(v[\\d.]+)", "BASE=alpine:(\\S+)",
                "maven:(\\S+)", "DEPS info.picocli:picocli:(\\S+)")) {
            String version = found(place, text).get(0);
            assertThat(found("(" + Pattern.quote(version) + ")", text)).isNotEmpty()
                    .hasSize(Collections.frequency(seen, version));
        }
    }

    // ---- Reading ---------------------------------------------------------------------------------------------------

    /** The pod of a Deployment, of a StatefulSet, or of a patch. */
    static PodSpec podOf(String manifest) {
        try {
            JsonNode template = YAML.readTree(manifest).at("/spec/template");
            return YAML.treeToValue(template, PodTemplateSpec.class).getSpec();
        } catch (IOException e) {
            throw new AssertionError(manifest, e);
        }
    }

    /** What README.md tells to save under this name. */
    static String saved(String name) {
        List<String> text = found("(?s)Save this as `" + name + "`(?:(?!```).)*?```yaml\n(.*?)```", README);
        assertThat(text).as(name).hasSize(1);
        return text.get(0);
    }

    /** The fenced blocks of README.md in this language. */
    private static List<String> blocks(String language) {
        return found("(?ms)^```" + language + "\n(.*?)^```$", README);
    }

    /** The first of them that holds the text. */
    static String block(String language, String text) {
        return blocks(language).stream().filter(block -> block.contains(text)).findFirst().orElseThrow();
    }

    /** The last group of every match. */
    static List<String> found(String regex, String text) {
        return Pattern.compile(regex).matcher(text).results().map(match -> match.group(match.groupCount())).toList();
    }

    /** The rows of the README's table with this heading, without the marks of code. */
    private static List<String> table(String heading) {
        List<String> rows = found(Pattern.quote(heading) + "\n\\|[-|]+\n((?:\\|.*\n)+)", README);
        assertThat(rows).as("tables of " + heading).hasSize(1);
        return rows.get(0).replace("`", "").lines().toList();
    }

    /** The part of --help from the one to the other, on one line. */
    private static String help(String start, String end) {
        try (Hook hook = Hook.start(Map.of(), "--help")) {
            assertThat(hook.exitCode()).isZero();
            String help = String.join(" ", hook.out()).replaceAll("\\s+", " ").replaceFirst(".*for a while\\.", "");
            return help.substring(help.indexOf(start), help.indexOf(end)).strip();
        }
    }

    private static void assertParses(String script) {
        try (Hook sh = Hook.run(List.of("sh", "-n", "-c", script), Map.of())) {
            assertThat(sh.exitCode()).as(sh.err() + "\n" + script).isZero();
        }
    }

    static String read(Path file) {
        try {
            return Files.readString(file);
        } catch (IOException e) {
            throw new UncheckedIOException(e);
        }
    }
}
