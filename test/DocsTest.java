import static org.assertj.core.api.Assertions.assertThat;

import com.fasterxml.jackson.core.JsonParser;
import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.MappingIterator;
import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.introspect.Annotated;
import com.fasterxml.jackson.databind.introspect.JacksonAnnotationIntrospector;
import com.fasterxml.jackson.dataformat.yaml.YAMLFactory;
import io.fabric8.kubernetes.api.model.ConfigMap;
import io.fabric8.kubernetes.api.model.Container;
import io.fabric8.kubernetes.api.model.HasMetadata;
import io.fabric8.kubernetes.api.model.PodSpec;
import io.fabric8.kubernetes.api.model.Service;
import io.fabric8.kubernetes.api.model.Volume;
import io.fabric8.kubernetes.api.model.VolumeMount;
import io.fabric8.kubernetes.api.model.apps.Deployment;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.TreeMap;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import java.util.stream.Collectors;
import java.util.stream.Stream;
import org.junit.jupiter.api.Test;

/** Holds README.md and configmap.yaml to the script, to Kubernetes' own model, and to themselves. */
class DocsTest {

    private static final Path README = Hook.REPOSITORY.resolve("README.md");
    private static final Path CONFIG_MAP = Hook.REPOSITORY.resolve("configmap.yaml");
    private static final String REGENERATE = "kubectl create configmap buildkit-prestop"
            + " --from-file=buildkit-prestop.java --dry-run=client -o yaml >configmap.yaml";

    private static final Map<String, Class<? extends HasMetadata>> KINDS = Map.of("apps/v1 Deployment",
            Deployment.class, "v1 Service", Service.class, "v1 ConfigMap", ConfigMap.class);
    private static final Set<String> INSTRUCTIONS = Set.of("ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE",
            "FROM", "HEALTHCHECK", "LABEL", "ONBUILD", "RUN", "SHELL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR");
    private static final ObjectMapper YAML = new ObjectMapper(new YAMLFactory())
            .enable(JsonParser.Feature.STRICT_DUPLICATE_DETECTION)
            .setAnnotationIntrospector(new JacksonAnnotationIntrospector() {
                /** No field is welcome that the model does not name. */
                @Override
                public Boolean hasAnySetter(Annotated method) {
                    return false;
                }
            });

    /** A fenced block of README.md. */
    record Block(String language, int line, String text) {
        /** Names it in a failure. */
        String where() {
            return "the block at README.md:" + line;
        }
    }

    // ---- configmap.yaml --------------------------------------------------------------------------------------------

    @Test
    void configMapHoldsExactlyTheScript() throws IOException {
        ConfigMap map = (ConfigMap) objects(new Block("yaml", 1, Files.readString(CONFIG_MAP))).get(0);
        assertThat(map.getData()).as("regenerate it: " + REGENERATE)
                .isEqualTo(Map.of("buildkit-prestop.java", Files.readString(Hook.SCRIPT)));
        assertThat(map.getMetadata().getName()).isEqualTo("buildkit-prestop");
    }

    @Test
    void configMapCanBeReadByPeople() throws IOException {
        assertThat(Files.readAllLines(CONFIG_MAP)).as("a tab or a blank at a line's end in the script spoils it")
                .contains("  buildkit-prestop.java: |");
    }

    @Test
    void readmeNamesTheCommandThatMakesTheConfigMap() {
        assertThat(blocks("sh")).as(REGENERATE).anyMatch(block -> block.text().replaceAll("\\\\\n *", "")
                .contains(REGENERATE));
    }

    // ---- README.md: blocks -----------------------------------------------------------------------------------------

    @Test
    void everyBlockIsOfALanguageThatIsChecked() {
        assertThat(blocks()).isNotEmpty().allSatisfy(block -> assertThat(block.language()).as(block.where())
                .isIn("yaml", "dockerfile", "sh", "console", "json", "text"));
        for (String language : List.of("yaml", "dockerfile", "sh")) {
            assertThat(blocks(language)).as(language).isNotEmpty();
        }
    }

    @Test
    void everyYamlBlockIsWhatKubernetesKnows() {
        for (Block block : blocks("yaml")) {
            assertThat(objects(block)).as(block.where()).isNotEmpty();
        }
    }

    @Test
    void everyManifestAgreesWithItself() throws IOException {
        ConfigMap script = (ConfigMap) objects(new Block("yaml", 1, Files.readString(CONFIG_MAP))).get(0);
        for (Block block : blocks("yaml")) {
            for (PodSpec pod : pods(block)) {
                Map<String, Volume> volumes = pod.getVolumes().stream()
                        .collect(Collectors.toMap(Volume::getName, volume -> volume));
                for (Container container : containers(pod)) {
                    for (VolumeMount mount : container.getVolumeMounts()) {
                        Volume volume = volumes.get(mount.getName());
                        assertThat(volume).as(block.where() + ": the volume " + mount.getName()).isNotNull();
                        if (volume.getConfigMap() != null) {
                            assertThat(volume.getConfigMap().getName()).isEqualTo(script.getMetadata().getName());
                            assertThat(script.getData()).containsKey(mount.getSubPath());
                        }
                    }
                }
            }
        }
    }

    @Test
    void everyShellBlockAndEveryShellCommandOfAManifestParses() {
        for (Block block : blocks("sh")) {
            assertParses(block.where(), block.text());
        }
        for (Block block : blocks("console")) {
            assertParses(block.where(), block.text().lines().filter(line -> line.startsWith("$ "))
                    .map(line -> line.substring(2)).collect(Collectors.joining("\n")));
        }
        int checked = 0;
        for (Block block : blocks("yaml")) {
            for (PodSpec pod : pods(block)) {
                for (List<String> command : commands(pod)) {
                    if (command.size() == 3 && command.subList(0, 2).equals(List.of("sh", "-c"))) {
                        assertParses(block.where(), command.get(2));
                        checked++;
                    }
                }
            }
        }
        assertThat(checked).isPositive();
    }

    @Test
    void everyDockerfileParses() {
        for (Block block : blocks("dockerfile")) {
            List<String[]> instructions = instructions(block);
            List<String> stages = new ArrayList<>();
            for (String[] instruction : instructions) {
                String arguments = instruction[1];
                switch (instruction[0]) {
                    case "FROM" -> {
                        Matcher from = Pattern.compile("\\S+( AS (?<name>[a-z]+))?").matcher(arguments);
                        assertThat(from.matches()).as(block.where() + ": FROM " + arguments).isTrue();
                        stages.add(from.group("name"));
                    }
                    case "RUN" -> assertParses(block.where(), arguments);
                    case "COPY" -> assertCopies(block, stages, arguments);
                    default -> assertThat(stages.isEmpty() && !instruction[0].equals("ARG"))
                            .as(block.where() + ": " + instruction[0] + " before FROM").isFalse();
                }
            }
            assertThat(stages).as(block.where()).isNotEmpty();
        }
    }

    @Test
    void theJarsDockerfileRepeatsTheScriptsJavaOptions() {
        List<Block> exporting = blocks("dockerfile").stream().filter(block -> block.text().contains("export fatjar"))
                .toList();
        // A runtime that jlink made has no other module.
        String options = String.join(" ", Hook.directive("JAVA_OPTIONS")).replaceFirst(" --limit-modules=\\S+", "");
        assertThat(exporting).isNotEmpty()
                .allSatisfy(block -> assertThat(block.text()).contains("\"" + options + "\""));
    }

    // ---- README.md: tables -----------------------------------------------------------------------------------------

    @Test
    void settingsTableAgreesWithHelp() {
        Map<String, String> fromHelp = new TreeMap<>();
        Matcher option = Pattern.compile("(?<flag>--[a-z-]+)(=[A-Z]+)? (?<text>.*?)( Default: (?<default>.*?))?"
                + "(?= --[a-z-]+(=[A-Z]+)? | -[a-zA-Z], |$)").matcher(helpSection("", "-h, --help"));
        while (option.find()) {
            Matcher text = Pattern.compile("(?<meaning>[^(]*?)( \\((?<variable>[A-Z_]+).*\\))?")
                    .matcher(option.group("text"));
            assertThat(text.matches()).as(option.group()).isTrue();
            fromHelp.put(option.group("flag"), String.join(" | ", nonNull(text.group("variable")),
                    nonNull(option.group("default")), text.group("meaning")));
        }
        Map<String, String> fromReadme = new TreeMap<>();
        for (List<String> row : table("environment", "flag", "default", "meaning")) {
            String meaning = row.get(3);
            String inHelp = fromHelp.getOrDefault(row.get(1), "").replaceFirst("^.* \\| .* \\| ", "");
            fromReadme.put(row.get(1), String.join(" | ", row.get(0), row.get(2),
                    meaning.startsWith(inHelp + ";") ? inHelp : meaning)); // the README may say more
        }
        assertThat(fromHelp).hasSizeGreaterThan(5);
        assertThat(fromReadme).isEqualTo(fromHelp);
    }

    @Test
    void exitCodeTableAgreesWithHelp() {
        Map<String, String> fromHelp = new TreeMap<>();
        Matcher code = Pattern.compile("(\\d+) (.*?)(?= \\d+ |$)").matcher(helpSection("Exit codes:", "A flag wins"));
        while (code.find()) {
            fromHelp.put(code.group(1), code.group(2));
        }
        Map<String, String> fromReadme = new TreeMap<>();
        table("code", "meaning").forEach(row -> fromReadme.put(row.get(0), row.get(1)));
        assertThat(fromHelp).hasSize(3);
        assertThat(fromReadme).isEqualTo(fromHelp);
    }

    // ---- README.md: links ------------------------------------------------------------------------------------------

    @Test
    void everyRelativeLinkLeadsToAFileAndEveryAnchorToAHeading() {
        Set<String> anchors = anchors();
        Matcher link = Pattern.compile("]\\((?<target>[^)\\s]+)\\)").matcher(prose());
        int links = 0;
        while (link.find()) {
            String target = link.group("target");
            if (target.startsWith("#")) {
                assertThat(anchors).as("the link " + target).contains(target.substring(1));
            } else if (!target.matches("https?://.*")) {
                assertThat(Hook.REPOSITORY.resolve(target.replaceFirst("#.*", ""))).as("the link " + target).exists();
            }
            links++;
        }
        assertThat(links).isPositive();
    }

    // ---- Parsing ---------------------------------------------------------------------------------------------------

    static List<Block> blocks() {
        List<Block> blocks = new ArrayList<>();
        String[] lines = readme().split("\n", -1);
        for (int i = 0; i < lines.length; i++) {
            if (lines[i].startsWith("```")) {
                int start = i++;
                while (!lines[i].equals("```")) {
                    i++; // the end of the file before the end of the block is an error that stops here
                }
                blocks.add(new Block(lines[start].substring(3), start + 1,
                        String.join("\n", Arrays.asList(lines).subList(start + 1, i)) + "\n"));
            }
        }
        return blocks;
    }

    static List<Block> blocks(String language) {
        return blocks().stream().filter(block -> block.language().equals(language)).toList();
    }

    /** The block's objects, read by the model of their kind. */
    static List<HasMetadata> objects(Block block) {
        try (MappingIterator<JsonNode> documents = YAML.readerFor(JsonNode.class).readValues(block.text())) {
            List<HasMetadata> objects = new ArrayList<>();
            for (JsonNode document : documents.readAll()) {
                String kind = document.path("apiVersion").asText() + " " + document.path("kind").asText();
                assertThat(KINDS).as(block.where()).containsKey(kind);
                objects.add(YAML.treeToValue(document, KINDS.get(kind)));
            }
            return objects;
        } catch (IOException e) {
            throw new AssertionError(block.where() + ": " + e.getMessage(), e);
        }
    }

    static List<PodSpec> pods(Block block) {
        return objects(block).stream().filter(Deployment.class::isInstance)
                .map(deployment -> ((Deployment) deployment).getSpec().getTemplate().getSpec()).toList();
    }

    private static List<Container> containers(PodSpec pod) {
        return Stream.concat(pod.getInitContainers().stream(), pod.getContainers().stream()).toList();
    }

    /** Every command that the pod's containers, probes and hooks name. */
    private static List<List<String>> commands(PodSpec pod) {
        List<List<String>> commands = new ArrayList<>();
        for (Container container : containers(pod)) {
            commands.add(container.getCommand());
            Stream.of(container.getStartupProbe(), container.getReadinessProbe(), container.getLivenessProbe())
                    .filter(probe -> probe != null).forEach(probe -> commands.add(probe.getExec().getCommand()));
            if (container.getLifecycle() != null) {
                commands.add(container.getLifecycle().getPreStop().getExec().getCommand());
            }
        }
        return commands;
    }

    /** The Dockerfile's instructions with their arguments, comments and line ends taken out. */
    private static List<String[]> instructions(Block block) {
        List<String[]> instructions = new ArrayList<>();
        for (String line : block.text().replaceAll("(?m)^\\s*#.*\n", "").replaceAll("\\\\\n\\s*", "").split("\n")) {
            if (!line.isBlank()) {
                String[] parts = line.split(" +", 2);
                assertThat(INSTRUCTIONS).as(block.where() + ": " + line).contains(parts[0]);
                assertThat(parts).as(block.where() + ": " + line).hasSize(2);
                instructions.add(parts);
            }
        }
        return instructions;
    }

    /** COPY takes from a stage before this one, or a file of the repository. */
    private static void assertCopies(Block block, List<String> stages, String arguments) {
        List<String> words = List.of(arguments.split(" "));
        assertThat(words).as(block.where() + ": COPY " + arguments).hasSizeGreaterThan(1);
        if (words.get(0).startsWith("--from=")) {
            assertThat(stages.subList(0, stages.size() - 1)).as(block.where()).contains(words.get(0).substring(7));
        } else {
            words.subList(0, words.size() - 1)
                    .forEach(source -> assertThat(Hook.REPOSITORY.resolve(source)).as(block.where()).exists());
        }
    }

    private static void assertParses(String where, String script) {
        try {
            Process sh = new ProcessBuilder("sh", "-n").redirectErrorStream(true).start();
            sh.getOutputStream().write(script.getBytes(StandardCharsets.UTF_8));
            sh.getOutputStream().close();
            String complaint = new String(sh.getInputStream().readAllBytes(), StandardCharsets.UTF_8);
            assertThat(sh.waitFor()).as(where + ": " + complaint + script).isZero();
        } catch (IOException | InterruptedException e) {
            throw new AssertionError(where, e);
        }
    }

    /** The rows of the README's only table with this heading, without the marks of code. */
    private static List<List<String>> table(String... heading) {
        List<List<String>> rows = new ArrayList<>();
        int tables = 0;
        boolean inside = false;
        for (String line : prose().split("\n")) {
            List<String> cells = line.startsWith("|") ? Stream.of(line.replaceFirst("\\|$", "").substring(1)
                    .split("\\|", -1)).map(cell -> cell.replace("`", "").strip()).toList() : List.of();
            boolean isHeading = cells.equals(List.of(heading));
            tables += isHeading ? 1 : 0;
            inside = isHeading || inside && !cells.isEmpty();
            if (inside && !isHeading && !cells.get(0).matches(":?-+:?")) {
                assertThat(cells).as(line).hasSize(heading.length);
                rows.add(cells);
            }
        }
        assertThat(tables).as("tables with the columns " + List.of(heading)).isEqualTo(1);
        return rows;
    }

    /** The part of --help between the two, on one line. */
    private static String helpSection(String start, String end) {
        try (Hook hook = Hook.start(Map.of(), "--help")) {
            assertThat(hook.exitCode()).isZero();
            String help = String.join(" ", hook.out()).replaceAll("\\s+", " ");
            int options = start.isEmpty() ? help.indexOf(" --port=") : help.indexOf(start) + start.length();
            assertThat(help).contains(start).contains(end);
            return help.substring(options, help.indexOf(end, options)).strip();
        }
    }

    /** The headings' anchors as GitHub makes them. */
    private static Set<String> anchors() {
        Map<String, Integer> anchors = new LinkedHashMap<>();
        for (String line : prose().split("\n")) {
            if (line.matches("#+ .*")) {
                String anchor = line.replaceFirst("#+ ", "").toLowerCase().replaceAll("[^\\w\\- ]", "")
                        .replace(' ', '-');
                int before = anchors.merge(anchor, 1, Integer::sum) - 1;
                if (before > 0) {
                    anchors.put(anchor + "-" + before, 1);
                }
            }
        }
        return anchors.keySet();
    }

    /** The README without its blocks. */
    private static String prose() {
        return readme().replaceAll("(?ms)^```.*?^```$", "");
    }

    private static String readme() {
        try {
            return Files.readString(README);
        } catch (IOException e) {
            throw new UncheckedIOException(e);
        }
    }

    private static String nonNull(String value) {
        return value == null ? "" : value;
    }
}
