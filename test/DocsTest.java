import static org.assertj.core.api.Assertions.assertThat;

import com.fasterxml.jackson.core.JsonParser;
import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.introspect.Annotated;
import com.fasterxml.jackson.databind.introspect.JacksonAnnotationIntrospector;
import com.fasterxml.jackson.dataformat.yaml.YAMLFactory;
import io.fabric8.kubernetes.api.model.ConfigMap;
import io.fabric8.kubernetes.api.model.PodSpec;
import io.fabric8.kubernetes.api.model.PodTemplateSpec;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.TreeMap;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import java.util.stream.Collectors;
import java.util.stream.Stream;
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
                public Boolean hasAnySetter(Annotated method) {
                    return false;
                }
            });

    /** A fenced block of README.md. */
    record Block(String language, String text) { }

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
        assertThat(README.getBytes(StandardCharsets.UTF_8)).hasSizeLessThanOrEqualTo(15_000);
        assertThat(saved("prestop.yaml").lines()).hasSizeLessThanOrEqualTo(36);
        assertThat(saved("baked.yaml").lines()).hasSizeLessThanOrEqualTo(12);
        assertThat(README.lines().filter(line -> !line.startsWith("|"))).allMatch(line -> line.length() <= 120);
    }

    @Test
    void everyBlockIsOfALanguageThatIsChecked() {
        assertThat(blocks()).extracting(Block::language).containsOnly("yaml", "dockerfile", "sh", "console");
        blocks("sh").forEach(block -> assertParses(block.text()));
    }

    @Test
    void demoPrintsWhatIsShown() {
        List<String> shown = blocks("console").get(0).text().lines().toList();
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
        String all = blocks("dockerfile").stream().map(Block::text).collect(Collectors.joining());
        List<String> stages = found(" AS (\\w+)", all); // the second Dockerfile goes on with the stages of the first
        found("(?s)<<'EOF' \\S+\n(.*?\n)EOF\n", all).forEach(DocsTest::assertParses);
        for (Block block : blocks("dockerfile")) {
            String instructions = block.text().replaceAll("(?s) <<'EOF' (\\S+)\n.*?\nEOF\n", " . $1\n");
            for (String line : instructions.replace("\\\n", "").split("\n")) {
                if (line.startsWith("RUN ")) {
                    assertParses(line.substring(4));
                } else if (line.startsWith("COPY --from=")) {
                    String from = line.replaceFirst("COPY --from=(\\S+) .*", "$1");
                    assertThat(stages).as(line).contains(from);
                } else if (line.startsWith("COPY ")) {
                    assertThat(Path.of(line.replaceFirst("--\\S+ ", "").split(" ")[1])).exists();
                }
            }
        }
    }

    @Test
    void bakedRuntimeHasTheScriptsJavaOptions() {
        // It has one module, and its command unsets JAVA_TOOL_OPTIONS, which its own options could not outdo.
        String options = Hook.directive("JAVA_OPTIONS").stream()
                .filter(option -> !option.matches("--limit-modules=.*|-XX:\\+Ignore.*|-XX:-Use.*GC"))
                .collect(Collectors.joining(" "));
        assertThat(blocks("dockerfile").get(0).text().replaceAll("\\\\\n *", "")).contains("\"" + options + "\"");
    }

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
        Map<String, String> fromHelp = new TreeMap<>();
        Matcher option = Pattern.compile("(?<flag>--[a-z-]+)(=[A-Z]+)? (?<meaning>[^(]*?)"
                + "( \\((?<variable>[A-Z_]+).*?\\))?( Default: (?<default>.*?))?(?= --[a-z-]+(=[A-Z]+)? |$)")
                .matcher(help(" --", "-h, --help"));
        while (option.find()) {
            fromHelp.put(option.group("flag"), Stream.of("variable", "default", "meaning").map(option::group)
                    .map(text -> text == null ? "" : text).collect(Collectors.joining(" | ")));
        }
        Map<String, String> fromReadme = new TreeMap<>();
        for (List<String> row : table("environment", "flag", "default", "meaning")) {
            String inHelp = fromHelp.getOrDefault(row.get(1), "");
            String inReadme = String.join(" | ", row.get(0), row.get(2), row.get(3));
            fromReadme.put(row.get(1), inReadme.startsWith(inHelp + ";") ? inHelp : inReadme); // it may say more
        }
        assertThat(fromHelp).hasSizeGreaterThan(8);
        assertThat(fromReadme).isEqualTo(fromHelp);
    }

    @Test
    void exitCodeTableAgreesWithHelp() {
        String help = help("Exit codes:", "A flag wins");
        assertThat(table("code", "meaning")).hasSize(4);
        assertThat(help).isEqualTo("Exit codes: " + table("code", "meaning").stream().map(row -> String.join(" ", row))
                .collect(Collectors.joining(" ")));
    }

    @Test
    void renovateSeesEveryMentionOfAVersion() {
        Map<String, Integer> seen = new TreeMap<>();
        for (JsonNode manager : Hook.json(read(Path.of(".github/renovate.json"))).path("customManagers")) {
            String files = manager.path("managerFilePatterns").valueStream().map(JsonNode::asText)
                    .map(pattern -> pattern.replaceAll("^/\\^|\\$/$", "")).collect(Collectors.joining("|"));
            for (JsonNode regex : manager.path("matchStrings")) {
                List<String> found = VERSIONED.stream().filter(file -> file.matches(files))
                        .flatMap(file -> Pattern.compile(regex.asText()).matcher(read(Path.of(file))).results())
                        .map(match -> match.group(match.groupCount())).toList();
                assertThat(found).as(regex.asText()).isNotEmpty();
                found.forEach(version -> seen.merge(version, 1, Integer::sum));
            }
        }
        String text = VERSIONED.stream().map(file -> read(Path.of(file))).collect(Collectors.joining());
        for (String version : List.of(found("\\nversion=(\\S+)", text).get(0), found("TAG=(v[\\d.]+)", text).get(0),
                found("DEPS info.picocli:picocli:(\\S+)", text).get(0))) {
            assertThat(seen.get(version)).as(version).isEqualTo(text.split(Pattern.quote(version), -1).length - 1);
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

    static List<Block> blocks(String... languages) {
        return Pattern.compile("(?ms)^```(\\w+)\n(.*?)^```$").matcher(README).results()
                .map(block -> new Block(block.group(1), block.group(2)))
                .filter(block -> languages.length == 0 || Set.of(languages).contains(block.language())).toList();
    }

    /** The first group of every match. */
    private static List<String> found(String regex, String text) {
        return Pattern.compile(regex).matcher(text).results().map(match -> match.group(1)).toList();
    }

    /** The rows of the README's table with this heading, without the marks of code. */
    private static List<List<String>> table(String... heading) {
        List<String> rows = found("(?m)^\\| " + String.join(" \\| ", heading)
                + " \\|\n\\|[-|]+\n((?:\\|.*\n)+)", README);
        assertThat(rows).as("tables of " + List.of(heading)).hasSize(1);
        return rows.get(0).lines().map(row -> Stream.of(row.substring(1, row.length() - 1).split("\\|", -1))
                .map(cell -> cell.replace("`", "").strip()).toList()).toList();
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
